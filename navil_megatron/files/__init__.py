"""Files and folders that are whole or absent, whatever is read from them and however large they are."""
