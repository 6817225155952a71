"""The served policy: vLLM's own HTTP app with recording, feedback and operator routes around it."""
