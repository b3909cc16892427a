"""OpenAI's completions and chat completions as data: request and response bodies, no files, no
HTTP."""
