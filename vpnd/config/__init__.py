"""The configuration: what can be set, how it is read, and the errors that name key, value and remedy."""
