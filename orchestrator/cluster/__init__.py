"""Ray clusters: connection, resources, authentication, shipping of code."""
