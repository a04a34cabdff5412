"""What every part may use: it knows no model, no request and no replica."""
