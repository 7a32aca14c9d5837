"""What runs inside of a machine: the kernel, the initramfs, the agent in it, and how the host talks to that agent."""
