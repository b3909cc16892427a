"""What `runner benchmark` times, beside what, and how it says so."""
