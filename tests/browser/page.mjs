// Opens one workflow in a running ComfyUI by dropping its file on the canvas, presses Run, and says what was seen.
//   node page.mjs URL WORKFLOW.json JOB.json
// JOB: {"nodes": {"TYPE": "picture.png", ..}, "graph": "picture.png" or null, "run": true, "seconds": 120,
//       "modern": false (true draws with Nodes 2.0)}
// Prints JSON: {nodes, errors, outcome, video: [width, height] or null, seconds, boxes: [[type, x, y, width, height], ..]
// in the graph's units, without the title, extension: what web/starflow.js did}. Environment: PLAYWRIGHT_DIR (a folder
// with node_modules/playwright-core), CHROMIUM (the browser's program).
import { createRequire } from 'node:module'
import fs from 'node:fs'
import path from 'node:path'

const { chromium } = createRequire(path.join(process.env.PLAYWRIGHT_DIR, 'index.js'))('playwright-core')
const [url, file, jobFile] = process.argv.slice(2)
const text = fs.readFileSync(file, 'utf8')
const job = JSON.parse(fs.readFileSync(jobFile, 'utf8'))
const workflow = JSON.parse(text)
const found = { nodes: 0, errors: [], outcome: null, video: null, seconds: 0, boxes: [], extension: null }
const TITLE = 30
const sleep = (ms) => new Promise((done) => setTimeout(done, ms))

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM,
  args: ['--no-sandbox', '--disable-gpu', '--force-color-profile=srgb'],
})
const context = await browser.newContext({ viewport: { width: 1700, height: 1150 } })
// The server alone: no accounts, no telemetry. What the page says about those isn't this pack's.
await context.route('**/*', (route) => {
  const address = route.request().url()
  return /^(data|blob):/.test(address) || address.startsWith(new URL(url).origin) ? route.continue() : route.abort()
})
const page = await context.newPage()
let opened = false
page.on('pageerror', (error) => opened && found.errors.push(String(error)))
page.on('console', (message) => {
  const line = `${message.text()} ${message.location().url}`
  const pages = !/starflow/i.test(line.replaceAll(url, '')) && /ERR_FAILED|Failed to load resource.*(401|404)|userdata|user\.css|api\.comfy\.org|firebase/i.test(line)
  if (opened && message.type() === 'error' && !pages) found.errors.push(line)
})

async function closeDialogs() {
  for (let i = 0; i < 4; i++) {
    if (!(await page.locator('[role=dialog], .p-dialog').count())) return
    await page.keyboard.press('Escape')
    await sleep(400)
  }
}

async function drop() {
  await page.evaluate(
    ([content, name]) => {
      const data = new DataTransfer()
      data.items.add(new File([content], name, { type: 'application/json' }))
      const canvas = window.app.canvasEl || window.app.canvas.canvas
      const box = canvas.getBoundingClientRect()
      const place = { clientX: box.x + box.width * 0.7, clientY: box.y + box.height * 0.8 }
      for (const kind of ['dragenter', 'dragover', 'drop'])
        canvas.dispatchEvent(new DragEvent(kind, { bubbles: true, cancelable: true, dataTransfer: data, ...place }))
    },
    [text, path.basename(file)],
  )
  await page.waitForFunction(
    (types) => types.every((type) => window.app.graph._nodes.some((node) => node.type === type)),
    workflow.nodes.map((node) => node.type),
    { timeout: 15000 },
  )
  await sleep(1500)
}

async function run() {
  await page.evaluate(() => {
    window.seen = {}
    for (const kind of ['execution_start', 'execution_success', 'execution_error', 'execution_interrupted'])
      window.app.api.addEventListener(kind, (event) => (window.seen[kind] = event.detail || true))
  })
  const began = Date.now()
  await page.getByTestId('queue-button').locator('button').or(page.getByTestId('queue-button')).first().click()
  await page.waitForFunction(() => Object.keys(window.seen).some((kind) => kind !== 'execution_start'), null, {
    timeout: job.seconds * 1000,
  })
  found.seconds = (Date.now() - began) / 1000
  const seen = await page.evaluate(() => window.seen)
  found.outcome = Object.keys(seen).find((kind) => kind !== 'execution_start').slice(10)
  if (found.outcome === 'error') found.errors.push(seen.execution_error.exception_message)
  await sleep(3000) // the output's node loads its file
  found.video = await page.evaluate(() => {
    const videos = [...document.querySelectorAll('video')].filter((video) => video.checkVisibility())
    for (const video of videos) video.currentTime = video.duration / 2
    return videos.length ? [videos[0].videoWidth, videos[0].videoHeight] : null
  })
  await sleep(700)
}

/** The small map lies over the graph, and a player's bar is drawn late when the scale changes. */
const HIDE = '[class*="minimap" i], [data-testid*="minimap" i], video::-webkit-media-controls { display: none !important }'

/** Brings a rectangle of the graph to the middle of the page and gives its place there. */
async function show(box, scale) {
  const place = await page.evaluate(
    ([[x, y, w, h], k]) => {
      const view = window.app.canvas
      const canvas = view.canvas.getBoundingClientRect()
      view.min_font_size_for_lod = 0 // text, however small
      view.ds.scale = k
      view.ds.offset[0] = (canvas.width / 2) / k - (x + w / 2)
      view.ds.offset[1] = (canvas.height / 2) / k - (y + h / 2)
      view.setDirty(true, true)
      const left = canvas.x + (x + view.ds.offset[0]) * k
      const top = canvas.y + (y + view.ds.offset[1]) * k
      return { x: left, y: top, width: w * k, height: h * k }
    },
    [box, scale],
  )
  await sleep(900)
  return place
}

async function picture(box, scale, target) {
  await page.addStyleTag({ content: HIDE })
  await page.screenshot({ path: target, clip: await show(box, scale) })
}

try {
  await page.goto(url, { waitUntil: 'domcontentloaded' })
  await page.waitForFunction(() => Object.keys(window.LiteGraph?.registered_node_types || {}).length > 100, null, {
    timeout: 90000,
  })
  await page.waitForFunction(() => window.app?.graph && window.app?.canvas)
  await sleep(3000)
  await closeDialogs()
  await page.evaluate((on) => window.app.ui.settings.setSettingValueAsync('Comfy.VueNodes.Enabled', on), job.modern)
  await sleep(500)
  opened = true
  await drop()
  const dialog = page.locator('[role=dialog], .p-dialog').first()
  if (await dialog.isVisible().catch(() => false)) found.errors.push(`a dialog: ${await dialog.innerText()}`)
  await closeDialogs()
  found.nodes = await page.evaluate(() => window.app.graph._nodes.length)
  const values = await page.evaluate(() => window.app.graph._nodes.map((node) => [node.id, node.widgets?.map((w) => w.value)]))
  for (const [id, shown] of values) {
    const wanted = workflow.nodes.find((node) => node.id === id)?.widgets_values
    if (wanted?.length && JSON.stringify(wanted) !== JSON.stringify((shown || []).slice(0, wanted.length)))
      found.errors.push(`node ${id} has ${JSON.stringify(shown)}, the file ${JSON.stringify(wanted)}`)
  }
  found.extension = await page.evaluate(() => {
    const frames = window.app.graph._nodes.find((node) => node.type === 'STARFlowEmptyLatent')?.widgets.find((w) => w.name === 'frames')
    if (!frames) return null
    const kept = frames.value
    const given = (value) => (frames.callback(value), frames.value)
    const lengths = Object.fromEntries([-4, 0, 1, 4, 5, 35].map((value) => [value, given(value)]))
    frames.value = kept
    const type = 'STARFLOW_MODEL'
    const colours = [
      window.app.canvas.default_connection_color_byType[type],
      window.LGraphCanvas.link_type_colors[type],
      document.documentElement.style.getPropertyValue(`--color-datatype-${type}`),
    ]
    return { lengths, step: frames.options.step2, colours }
  })
  if (job.run) await run()
  // Sizes as the page has them now: it has grown what was too small.
  const boxes = await page.evaluate(
    ([modern, title]) =>
      window.app.graph._nodes.map((node) => {
        const drawn = modern && document.querySelector(`[data-node-id="${node.id}"]`)
        const scale = window.app.canvas.ds.scale
        const height = drawn ? drawn.getBoundingClientRect().height / scale - title : node.size[1]
        return [node.type, ...node.pos, drawn ? drawn.getBoundingClientRect().width / scale : node.size[0], height]
      }),
    [job.modern, TITLE],
  )
  found.boxes = boxes
  for (const [type, target] of Object.entries(job.nodes)) {
    const [, x, y, w, h] = boxes.find((box) => box[0] === type)
    await picture([x - 24, y - 54, w + 48, h + 78], 1, target)
  }
  if (job.graph) {
    const others = await page.evaluate(() => [
      ...window.app.graph._groups.map((group) => ['', ...group.pos, ...group.size]),
      ...[...window.app.graph.reroutes.values()].map((point) => ['', ...point.pos, 0, 0]),
    ])
    const drawn = [...boxes.map(([type, x, y, w, h]) => [type, x, y - TITLE, w, h + TITLE]), ...others]
    const left = Math.min(...drawn.map((b) => b[1])) - 30
    const top = Math.min(...drawn.map((b) => b[2])) - 30
    const width = Math.max(...drawn.map((b) => b[1] + b[3])) + 30 - left
    const height = Math.max(...drawn.map((b) => b[2] + b[4])) + 30 - top
    await picture([left, top, width, height], Math.min(1500 / width, 950 / height, 1), job.graph)
  }
} catch (error) {
  found.errors.push(`driver: ${error}`)
} finally {
  await browser.close()
}
console.log(JSON.stringify(found))
