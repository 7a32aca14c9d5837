"""The guest agent (in C), its protocol, and the host's side of that protocol."""
