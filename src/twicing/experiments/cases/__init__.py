"""Models that are looked into: of timm, of transformers, or trained by a comparison, and what each is shown."""
