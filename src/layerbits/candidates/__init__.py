"""What to try: pairs, formats, overlays and their bits. Pure: dicts in, dicts with a hash out."""
