"""The study file: its keys as strict models, the rules between them, and what a person is told who breaks one."""
