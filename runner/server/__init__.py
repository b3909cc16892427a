"""The engine behind HTTP: OpenAI's endpoints, for clients that wait for their answer."""
