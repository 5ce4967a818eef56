"""Ways to a Ray cluster: joining or starting one, what it offers, who may talk to it, what travels to it."""
