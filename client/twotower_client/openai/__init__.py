"""A front end with OpenAI's HTTP interface, for a running server: `twotower openai`."""
