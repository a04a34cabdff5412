"""The web application: log-in, sessions, limits, audit log, and one page."""
