"""MLflow follows the journal: slow, down or restarted, it costs a study neither time nor a number."""
