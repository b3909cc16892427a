"""OpenAI's completions, chat completions and embeddings as data: request and response bodies, no
files, no HTTP."""
