"""The page that `nestd dashboard` serves (docs/dashboard.md): static files, no build step."""
