// Colours for the pack's own sockets, and clip lengths that step from one that a model can make to the next.
import { app } from '../../scripts/app.js'

const COLOURS = {
  STARFLOW_MODEL: '#c78bff',
  STARFLOW_TEXT_ENCODER: '#ffcf5c',
  STARFLOW_CONTEXT: '#5fd3a5',
  STARFLOW_SOLVER: '#ff8f6b',
  STARFLOW_OPTIONS: '#6bb7ff',
  STARFLOW_NOISE: '#f48fc0',
}

/** The host takes unknown types' colours away when it applies a palette, so this is done for each graph anew. */
function paint() {
  Object.assign(app.canvas.default_connection_color_byType, COLOURS)
  Object.assign(window.LGraphCanvas.link_type_colors, COLOURS)
  for (const [type, colour] of Object.entries(COLOURS))
    document.documentElement.style.setProperty(`--color-datatype-${type}`, colour)
}

/** 0 is the model's own length, 1 an image; clips have 4n + 1 frames. */
const allowed = (frames) => (frames < 1 ? 0 : 4 * Math.floor((frames - 1) / 4) + 1)

app.registerExtension({
  name: 'STARFlow',
  setup: paint,
  afterConfigureGraph: paint,
  nodeCreated(node) {
    if (node.comfyClass !== 'STARFlowEmptyLatent') return
    const frames = node.widgets.find((widget) => widget.name === 'frames')
    Object.assign(frames.options, { step: 40, step2: 4 }) // `step` is ten times as much, for older pages
    frames.callback = function (value) {
      this.value = allowed(value)
    }
  },
})
