"""A server over one engine, in the shape of OpenAI's API."""
