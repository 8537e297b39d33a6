"""People in the judge's place: a local page that shows two answers side by side, and what they say of them."""
