"""The bundled model's language: eight words that say what a clip shows.

A prompt such as "a red disc moving right and a blue star moving up over coffee, camera pans left" fills eight slots:
scene, camera, and colour, shape and direction of the front and the rear object. An empty prompt is the
unconditional one of classifier-free guidance.
"""

import re

SCENES = ("astronaut", "cat", "coffee", "rocket", "galaxy", "brick", "cameraman", "grass")
CAMERAS = ("still", "pans left", "pans right", "zooms in", "zooms out")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
SHAPES = ("disc", "square", "triangle", "star", "ring", "cross")
DIRECTIONS = ("left", "right", "up", "down")

SLOTS = {
    "scene": SCENES,
    "camera": CAMERAS,
    "front colour": COLOURS,
    "front shape": SHAPES,
    "front direction": DIRECTIONS,
    "rear colour": COLOURS,
    "rear shape": SHAPES,
    "rear direction": DIRECTIONS,
}
VOCABULARY = ("", *dict.fromkeys(word for words in SLOTS.values() for word in words))
_WORD = {word: index for index, word in enumerate(VOCABULARY)}
_OBJECT = re.compile(rf"\b(?:an? |the )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) moving ({'|'.join(DIRECTIONS)})\b")
_SCENE = re.compile(rf"\bover (?:a |an |the )?({'|'.join(SCENES)})\b")
_CAMERA = re.compile(rf"\b(?:the )?camera (?:is )?({'|'.join(CAMERAS)})\b")
_GLUE = re.compile(r"[\s,.]|\band\b")
CALIBRATION_PROMPTS = (
    "a red disc moving right and a blue star moving up over coffee, camera pans left",
    "a yellow ring moving down and a green square moving left over the astronaut, camera zooms in",
)
EVALUATION_PROMPTS = (
    "a white triangle moving left over galaxy, camera still",
    "a cyan cross moving right and a purple disc moving left over cat, camera zooms out",
    "an orange star moving up and a white ring moving down over brick, camera pans right",
    "a green triangle moving left and a red square moving right over the rocket, camera still",
    "a blue disc moving down over the cameraman, camera pans left",
    "a red ring moving up and a yellow cross moving right over grass, camera zooms in",
    "a purple square moving right and an orange disc moving down over the astronaut, camera pans right",
    "a green star moving down over coffee, camera zooms out",
    "a yellow disc moving left and a cyan triangle moving up over galaxy, camera zooms in",
    "a white square moving up and a blue ring moving right over cat, camera still",
    "a red cross moving left over brick, camera zooms out",
    "a purple star moving right and a green disc moving left over the rocket, camera pans left",
    "an orange triangle moving down and a white cross moving up over the cameraman, camera zooms in",
    "a cyan ring moving left and a red star moving down over grass, camera pans right",
    "a blue square moving left over the astronaut, camera still",
    "a yellow triangle moving right and a purple ring moving up over coffee, camera pans right",
)
_EXAMPLE = CALIBRATION_PROMPTS[0]


def words_of(prompt: str) -> tuple[str, ...]:
    """The eight words a prompt asks for, "" in the rear object's slots when there is only one object.

    Raises:
        ValueError: If the prompt does not name one or two objects, a scene and a camera in the known words.
    """
    if not prompt.strip():
        return ("",) * len(SLOTS)
    text = re.sub(r"\s+", " ", prompt.lower())
    objects, scene, camera = _OBJECT.findall(text), _SCENE.search(text), _CAMERA.search(text)
    rest = _GLUE.sub("", _CAMERA.sub("", _SCENE.sub("", _OBJECT.sub("", text), count=1), count=1))
    if not 1 <= len(objects) <= 2 or scene is None or rest:
        raise ValueError(
            f"the bundled model understands prompts like {_EXAMPLE!r}; got {prompt!r}. "
            f"Scenes: {', '.join(SCENES)}. Colours: {', '.join(COLOURS)}. Shapes: {', '.join(SHAPES)}. "
            f"Directions: {', '.join(DIRECTIONS)}. Cameras: {', '.join(CAMERAS)}."
        )
    front, rear = objects[0], objects[1] if len(objects) == 2 else ("", "", "")
    return (scene[1], camera[1] if camera else "still", *front, *rear)


def prompt_of(words: tuple[str, ...]) -> str:
    """The sentence that `words_of` turns back into these words."""
    scene, camera, *objects = words
    named = [objects[i : i + 3] for i in (0, 3) if objects[i]]
    shown = " and ".join(
        f"{_article(colour)} {colour} {shape} moving {direction}" for colour, shape, direction in named
    )
    return f"{shown} over {scene}, camera {camera}"


def _article(colour: str) -> str:
    return "an" if colour[0] in "aeiou" else "a"


def ids_of(words: tuple[str, ...]) -> list[int]:
    """Indices into `VOCABULARY`, one per slot."""
    return [_WORD[word] for word in words]
