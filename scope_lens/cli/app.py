"""The verbs register here; `scope_lens.cli` imports their modules."""

import tyro

app = tyro.extras.SubcommandApp()
