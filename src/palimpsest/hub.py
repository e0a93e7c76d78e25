"""What talking to the Hugging Face hub may raise."""


def hub_errors() -> tuple[type[Exception], ...]:
    """The errors of a refused or failed request; the base class of the hub's HTTP library differs by version."""
    from huggingface_hub.errors import HfHubHTTPError

    transport = [base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"]
    return (OSError, ValueError, RuntimeError, *transport)
