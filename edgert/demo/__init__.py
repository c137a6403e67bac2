"""The embedded model, a file beside this one; NOTICE.md has its origin, licence and figures."""
