"""Pretrained networks: loading, weights, blocks and layers, batch norm, precision."""
