"""The web form's engine room: what visitors may ask for, their jobs, and who runs them. No page is in here."""
