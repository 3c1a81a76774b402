"""Training clips, rendered on the fly: a photograph under a moving camera, with two shapes that move and occlude.

Photographs come with scikit-image: astronaut, rocket and galaxy are in the public domain (NASA, SpaceX), cat, coffee,
brick, grass and cameraman are CC0. Clips are (B, 3, F, H, W) in [-1, 1]. Every random number comes from one
generator, so a seed fixes the data.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from paroattn.demo.prompt import CAMERAS, COLOURS, DIRECTIONS, SCENES, SHAPES, VOCABULARY

PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "rocket": "rocket.jpg",
    "galaxy": "hubble_deep_field.jpg",
    "brick": "brick.png",
    "cameraman": "camera.png",
    "grass": "grass.png",
}
RGB = {
    "red": (0.9, 0.1, 0.1),
    "orange": (1.0, 0.55, 0.05),
    "yellow": (0.98, 0.9, 0.1),
    "green": (0.1, 0.75, 0.2),
    "cyan": (0.1, 0.85, 0.9),
    "blue": (0.12, 0.25, 0.95),
    "purple": (0.6, 0.15, 0.8),
    "white": (0.97, 0.97, 0.97),
}
HEADING = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
PAN = {"still": 0.0, "pans left": -1.0, "pans right": 1.0, "zooms in": 0.0, "zooms out": 0.0}
ZOOM = {"still": 0.0, "pans left": 0.0, "pans right": 0.0, "zooms in": -1.0, "zooms out": 1.0}
ONE_OBJECT = 0.2
SUPERSAMPLE = 2


@dataclass(frozen=True)
class Words:
    """Indices into the word lists, each (B,); `rear_present` is False where the clip has one object."""

    scene: Tensor
    camera: Tensor
    colour: Tensor
    shape: Tensor
    direction: Tensor
    rear_present: Tensor

    def ids(self) -> Tensor:
        """Vocabulary indices (B, 8) in the order of the prompt's slots."""
        lists = (SCENES, CAMERAS, COLOURS, SHAPES, DIRECTIONS)
        look_up = [
            torch.tensor([VOCABULARY.index(word) for word in words], device=self.scene.device) for words in lists
        ]
        scene, camera = look_up[0][self.scene], look_up[1][self.camera]
        objects = [
            table[field] for table, field in zip(look_up[2:], (self.colour, self.shape, self.direction), strict=True)
        ]
        front, rear = [field[:, 0] for field in objects], [field[:, 1] * self.rear_present for field in objects]
        return torch.stack([scene, camera, *front, *rear], dim=1)


def load_photographs(device: torch.device, height: int = 160) -> Tensor:
    """All scenes as (scenes, 3, height, 4/3·height) in [-1, 1]."""
    from pathlib import Path

    import skimage.data
    import skimage.io

    folder = Path(skimage.data.__file__).parent
    width = height * 4 // 3
    photographs = []
    for scene in SCENES:
        pixels = torch.from_numpy(skimage.io.imread(folder / PHOTOGRAPHS[scene])).float() / 127.5 - 1
        pixels = pixels[..., None].expand(-1, -1, 3) if pixels.ndim == 2 else pixels[..., :3]
        pixels = _centre_crop(pixels.permute(2, 0, 1), 4 / 3)
        photographs.append(F.interpolate(pixels[None], (height, width), mode="bilinear", antialias=True)[0])
    return torch.stack(photographs).to(device)


def draw_words(batch: int, generator: Generator, *, held_out: bool = False) -> Words:
    """Random words; combinations of scene, colour and shape with index sum divisible by 11 are never trained on."""
    device = generator.device

    def pick(count: int, *shape: int) -> Tensor:
        return torch.randint(count, shape, generator=generator, device=device)

    many = batch * 40 if held_out else batch * 3
    words = Words(
        pick(len(SCENES), many),
        pick(len(CAMERAS), many),
        pick(len(COLOURS), many, 2),
        pick(len(SHAPES), many, 2),
        pick(len(DIRECTIONS), many, 2),
        torch.rand(many, generator=generator, device=device) >= ONE_OBJECT,
    )
    withheld = (words.scene * 31 + words.colour[:, 0] * 7 + words.shape[:, 0] * 3) % 11 == 0
    chosen = (withheld == held_out).nonzero()[:batch, 0]
    return Words(*(field[chosen] for field in vars(words).values()))


def render(words: Words, photographs: Tensor, size: tuple[int, int, int], generator: Generator) -> Tensor:
    """Draw clips (B, 3, F, H, W) in [-1, 1] for the words; positions, sizes, speeds and spins are random."""
    frames, height, width = size
    fine = (height * SUPERSAMPLE, width * SUPERSAMPLE)
    time = torch.linspace(0, 1, frames, device=photographs.device)
    clip = _background(words, photographs, time, fine, generator)
    for rear in (1, 0):
        present = words.rear_present if rear else torch.ones_like(words.rear_present)
        clip = _paint_object(clip, words, rear, present, time, generator)
    batch = clip.shape[0]
    coarse = F.avg_pool2d(clip.flatten(0, 1), SUPERSAMPLE)
    return coarse.view(batch, frames, 3, height, width).transpose(1, 2).contiguous()


def _centre_crop(pixels: Tensor, aspect: float) -> Tensor:
    height, width = pixels.shape[1:]
    crop_height, crop_width = min(height, int(width / aspect)), min(width, int(height * aspect))
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return pixels[:, top : top + crop_height, left : left + crop_width]


def _uniform(generator: Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


def _background(words: Words, photographs: Tensor, time: Tensor, fine: tuple[int, int], generator: Generator) -> Tensor:
    """Photographs under the camera's motion, (B, F, 3, H, W)."""
    batch, frames = words.scene.shape[0], time.shape[0]
    pan = torch.tensor([PAN[camera] for camera in CAMERAS], device=time.device)[words.camera]
    zoom = torch.tensor([ZOOM[camera] for camera in CAMERAS], device=time.device)[words.camera]
    around = time - 0.5
    scale = _uniform(generator, 0.55, 0.75, batch)[:, None] * torch.exp(zoom[:, None] * 0.45 * around)
    reach = (1 - scale.amax(1)).clamp_min(0)
    start_x, start_y = (_uniform(generator, -1, 1, batch) * reach * 0.6 for _ in range(2))
    move = _uniform(generator, 0.35, 0.6, batch) * pan
    x = start_x[:, None] + move[:, None] * around
    theta = torch.zeros(batch, frames, 2, 3, device=time.device)
    theta[..., 0, 0], theta[..., 1, 1] = scale, scale
    theta[..., 0, 2], theta[..., 1, 2] = x, start_y[:, None]
    grid = F.affine_grid(theta.flatten(0, 1), [batch * frames, 3, *fine], align_corners=False)
    source = photographs[words.scene].repeat_interleave(frames, dim=0)
    return F.grid_sample(source, grid, padding_mode="reflection", align_corners=False).view(batch, frames, 3, *fine)


def _paint_object(
    clip: Tensor, words: Words, which: int, present: Tensor, time: Tensor, generator: Generator
) -> Tensor:
    """Paint one object per clip over (B, F, 3, H, W)."""
    batch, height, width = clip.shape[0], clip.shape[3], clip.shape[4]
    device, aspect = clip.device, clip.shape[4] / clip.shape[3]
    heading = torch.tensor([HEADING[word] for word in DIRECTIONS], device=device)[words.direction[:, which]]
    size = _uniform(generator, 0.36, 0.54, batch)
    middle = torch.stack([_uniform(generator, -0.65, 0.65, batch) * aspect, _uniform(generator, -0.55, 0.55, batch)], 1)
    speed = _uniform(generator, 0.7, 1.3, batch)
    turn = _uniform(generator, -0.3, 0.3, batch)
    spin = _uniform(generator, -0.5, 0.5, batch)
    centre = middle[:, None] + heading[:, None] * speed[:, None, None] * (time - 0.5)[None, :, None]
    angle = turn[:, None] + spin[:, None] * time
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height, device=device),
        torch.linspace(-aspect, aspect, width, device=device),
        indexing="ij",
    )
    dx, dy = x - centre[..., 0, None, None], y - centre[..., 1, None, None]
    cos, sin = angle.cos()[..., None, None], angle.sin()[..., None, None]
    size = size[:, None, None, None]
    u, v = (cos * dx + sin * dy) / size, (cos * dy - sin * dx) / size
    inside = _distance(u, v, words.shape[:, which])
    cover = (-inside * size * height / 2).add(0.5).clamp(0, 1) * present[:, None, None, None]
    colour = torch.tensor([RGB[word] for word in COLOURS], device=device)[words.colour[:, which]] * 2 - 1
    shade = (1 + 0.18 * (-v - u)).clamp(0.7, 1.2)
    painted = ((colour[:, None, :, None, None] + 1) * shade[:, :, None]).clamp(0, 2) - 1
    return torch.lerp(clip, painted, cover[:, :, None])


def _distance(u: Tensor, v: Tensor, shape: Tensor) -> Tensor:
    """Signed distance, in units of the object's size, to each clip's own shape."""
    radius, theta = torch.hypot(u, v), torch.atan2(v, u)
    petal = torch.remainder(theta, 2 * torch.pi / 5) - torch.pi / 5
    arm = torch.minimum(u.abs(), v.abs())
    distances = {
        "disc": radius - 0.9,
        "square": torch.maximum(u.abs(), v.abs()) - 0.8,
        "triangle": torch.maximum(v - 0.55, torch.maximum(0.87 * u - 0.5 * v, -0.87 * u - 0.5 * v) - 0.55),
        "star": radius - 0.42 - 0.62 * (petal.abs() / (torch.pi / 5)) ** 1.3,
        "ring": (radius - 0.72).abs() - 0.26,
        "cross": torch.maximum(torch.maximum(u.abs(), v.abs()) - 0.95, arm - 0.3),
    }
    stacked = torch.stack([distances[name] for name in SHAPES])
    return stacked[shape, torch.arange(u.shape[0], device=u.device)]
