"""Exported folders as models of public toolkits. Each file imports its toolkit, and nothing else imports the file."""
