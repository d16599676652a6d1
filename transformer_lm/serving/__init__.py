"""A model as a server: what OpenAI's clients ask, answered by one thread that writes texts side by side."""
