"""Stamps made here, in the form of Tux Paint's: a coloured square or disc a name."""

from pathlib import Path

from PIL import Image, ImageDraw

NAMES = {
    "animals": "cat dog cow hen fox bat owl pig rat ant bee elk",
    "food": "pie bun fig nut pea egg ham jam",
    "plants": "oak fir ivy elm yew ash",
    "vehicles": "car van bus cab jet tram",
    "clothes": "hat cap sock shoe tie scarf",
}


def write_stamps(folder: Path) -> Path:
    """A folder of them; one has a caption that is no name."""
    for number, (kind, names) in enumerate(NAMES.items()):
        for other, name in enumerate(names.split()):
            place = folder / kind / "some"
            place.mkdir(parents=True, exist_ok=True)
            image = Image.new("RGBA", (60, 60))
            pen = ImageDraw.Draw(image)
            shape = pen.ellipse if number % 2 else pen.rectangle
            shape((5, 5, 54, 54), fill=(40 * number, 20 * other, 200, 255))
            image.save(place / f"{name}.png")
            (place / f"{name}.txt").write_text(f"A {name}.\nde.utf8=Ein Ding\n")
    (folder / "animals" / "none.png").write_bytes((folder / "animals" / "some" / "cat.png").read_bytes())
    (folder / "animals" / "none.txt").write_text("Remember to wash your hands with soap!\n")
    return folder
