"""What a run is: frozen dataclasses read from TOML. Loads without torch, in milliseconds."""
