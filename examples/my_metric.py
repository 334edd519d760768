import duo


@duo.metric("digits")
def digits(tokens, texts):
    """The share of digits among a sample's letters."""
    return [sum(x.isdigit() for x in text) / max(1, len(text)) for text in texts]
