"""How instruction data is made: translated, drawn from image-text pairs of the web, read off web pages."""
