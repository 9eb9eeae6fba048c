"""Whether mHC is healthy while it trains: gains of the mappings, logged (`monitor`), and drawn afterwards (`command`)."""
