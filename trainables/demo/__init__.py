"""The built-in digits and their small pretrained networks."""
