"""What a user types into: the menu after a search, and the chat."""
