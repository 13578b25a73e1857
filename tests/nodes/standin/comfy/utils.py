PROGRESS_BAR_HOOK = None  # the server's, if there is one: value, total, preview, node_id


class ProgressBar:
    def __init__(self, total: int, node_id: str | None = None):
        self.total, self.node_id, self.hook = total, node_id, PROGRESS_BAR_HOOK

    def update_absolute(self, value: int, total: int | None = None, preview=None) -> None:
        self.total = total or self.total
        if self.hook:
            self.hook(min(value, self.total), self.total, preview, node_id=self.node_id)
