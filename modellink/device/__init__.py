"""What an accelerator is, and the one place (with `ops`) that names one."""
