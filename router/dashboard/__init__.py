"""What the dashboard shows, and its page: the last hour in figures, decisions as they are made, the fleet, prefixes."""
