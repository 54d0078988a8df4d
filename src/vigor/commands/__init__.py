"""The subcommands of `vigor`, one file each."""
