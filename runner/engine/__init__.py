"""The batched engine: token ids in, token ids and logprobs out; no text, files, HTTP or Hydra."""
