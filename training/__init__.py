"""One training round: dataset, SFT, reward model, PPO, publication and gate."""
