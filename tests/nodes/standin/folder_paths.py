"""A stand-in: a host without any model files."""


def get_filename_list(folder: str) -> list[str]:
    return []


def get_folder_paths(folder: str) -> list[str]:
    return []


def get_full_path(folder: str, name: str) -> None:
    return None
