"""Which arithmetic the layers use. The only folder that may name Transformer Engine or Apex."""
