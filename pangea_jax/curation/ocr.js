// The functions that ocr.py calls in a page; they run in an isolated world. They return CSS pixels of the screen. These
// differ from the page's own CSS pixels on a phone, where a page without a mobile layout is wider and zoomed out.
() => {
  const SHOWS_NO_DOM_TEXT = "img, picture, video, canvas, iframe, object, embed, input, textarea, select, svg";
  const MAX_TEXT_NODES = 20000;
  const STEP = 40; // distance between the points of a line where the topmost element is checked
  const INSET = 2; // elementFromPoint rounds the edges of elements to pixels
  const TOLERANCE = 2; // letters may be a little wider than their element
  const NO_INK = 0.15; // share of a line's height without ink, above and below the letters

  // Before the measurements: stop all movement, and let elementFromPoint find overlays that ignore clicks.
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(`*, *::before, *::after { animation: none !important; transition: none !important;
    scroll-behavior: auto !important; caret-color: transparent !important; pointer-events: auto !important; }`);
  document.adoptedStyleSheets = [...document.adoptedStyleSheets, sheet];

  const texts = [];
  const walker = document.createTreeWalker(document.body ?? document.documentElement, NodeFilter.SHOW_TEXT);
  while (walker.nextNode() && texts.length <= MAX_TEXT_NODES)
    if (walker.currentNode.data.trim()) texts.push(walker.currentNode);
  const elements = [...new Set(texts.map((text) => text.parentElement))].filter(
    (element) => element instanceof HTMLElement);

  const range = document.createRange();
  const linesOf = (text) => {
    range.selectNodeContents(text);
    return [...range.getClientRects()].filter((line) => line.width > 0 && line.height > 0)
      .map(({ left, top, right, bottom, height }) =>
        ({ left, right, top: top + NO_INK * height, bottom: bottom - NO_INK * height }));
  };
  const overlap = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
  const isVisible = (element) =>
    element.checkVisibility({ opacityProperty: true, visibilityProperty: true, contentVisibilityAuto: true });

  // Whether the part of a line in the box is visible. Text for screen readers only is clipped away.
  const isSeen = (line, around, parent) => {
    if (!isVisible(parent)) return false;
    const left = Math.max(line.left, around.left), right = Math.min(line.right, around.right);
    const y = (Math.max(line.top, around.top) + Math.min(line.bottom, around.bottom)) / 2;
    return [0.05, 0.5, 0.95].some((part) => parent.contains(document.elementFromPoint(left + part * (right - left), y)));
  };

  // Why the visible text differs from the text in the DOM; empty if it does not.
  const disguise = (element) => {
    for (const pseudo of ["::before", "::after"]) {
      const { content } = getComputedStyle(element, pseudo);
      if (!["none", "normal", '""', ""].includes(content)) return "generated content";
    }
    for (const part of [element, ...element.querySelectorAll("*")])
      if (getComputedStyle(part).unicodeBidi.endsWith("override")) return "reversed by unicode-bidi";
    return "";
  };

  // A letter without a glyph looks like U+0378, which is not assigned, so no font has it.
  const context = new OffscreenCanvas(48, 48).getContext("2d", { willReadFrequently: true });
  const drawn = new Map();
  const draw = (font, letter) => {
    const key = font + letter;
    if (!drawn.has(key)) {
      context.clearRect(0, 0, 48, 48);
      context.font = font;
      context.fillText(letter, 4, 36);
      drawn.set(key, context.getImageData(0, 0, 48, 48).data.join());
    }
    return drawn.get(key);
  };
  const missingGlyph = (element) => {
    const style = getComputedStyle(element);
    const font = `${style.fontStyle} ${style.fontWeight} 28px ${style.fontFamily}`;
    const letters = new Set(element.innerText.match(/[\p{L}\p{N}]/gu) ?? []);
    return [...letters].find((letter) => draw(font, letter) === draw(font, "\u0378")) ?? "";
  };

  globalThis.candidates = () => ({
    language: document.documentElement.lang,
    text: (document.body ?? document.documentElement).innerText.slice(0, 4000),
    tooLarge: texts.length > MAX_TEXT_NODES,
    height: document.documentElement.scrollHeight * visualViewport.scale,
    elements: elements.map((element, index) => ({ element, index })).filter(({ element }) => isVisible(element))
      .map(({ element, index }) => {
        const { top, width, height } = element.getBoundingClientRect();
        const zoom = visualViewport.scale;
        return {
          index, tag: element.localName, text: element.innerText, top: (top + scrollY) * zoom,
          width: width * zoom, height: height * zoom,
          font: parseFloat(getComputedStyle(element).fontSize) * zoom,
        };
      }),
  });

  // Scrolls the page to `top` and checks a red box with `margin` around the element. `fault` is empty if it may be drawn.
  globalThis.inspect = (index, top, margin) => {
    const { scale: zoom, offsetLeft, offsetTop, width: screenWidth, height: screenHeight } = visualViewport;
    scrollTo(0, top / zoom);
    margin /= zoom;
    const element = elements[index];
    const { left, top: upper, right, bottom } = element.getBoundingClientRect();
    const box = { left, top: upper, right, bottom };
    const around = { left: left - margin, top: upper - margin, right: right + margin, bottom: bottom + margin };
    const fault = (reason) => ({ fault: reason });
    if (around.left < offsetLeft || around.top < offsetTop || around.right > offsetLeft + screenWidth ||
        around.bottom > offsetTop + screenHeight) return fault("box would leave the screen");
    const own = [];
    for (const text of texts) {
      const lines = linesOf(text);
      if (element.contains(text)) own.push(...lines.map((line) => ({ line, parent: text.parentElement })));
      else if (lines.some((line) => overlap(line, around) && isSeen(line, around, text.parentElement)))
        return fault("other text in the box");
    }
    if (own.length === 0) return fault("not visible");
    for (const { line, parent } of own) {
      if (line.left < left - TOLERANCE || line.right > right + TOLERANCE ||
          line.top < upper - TOLERANCE || line.bottom > bottom + TOLERANCE) return fault("text outside its element");
      const width = line.right - line.left, height = line.bottom - line.top;
      const steps = Math.max(2, Math.ceil(width / STEP));
      for (let step = 0; step <= steps; step++) {
        const x = line.left + INSET + (step / steps) * (width - 2 * INSET);
        for (const y of [line.top + 0.3 * height, line.bottom - 0.3 * height]) {
          const hit = document.elementFromPoint(x, Math.min(Math.max(y, upper + 0.5), bottom - 0.5));
          if (!hit || !parent.contains(hit)) return fault("covered or cut off");
        }
      }
    }
    for (const other of document.querySelectorAll(SHOWS_NO_DOM_TEXT))
      if (overlap(other.getBoundingClientRect(), around) && isVisible(other)) return fault("picture in the box");
    const disguised = disguise(element);
    if (disguised) return fault(`text is not as in the DOM: ${disguised}`);
    const letter = missingGlyph(element);
    if (letter) return fault("no font has a letter");
    const onScreen = ({ left, top, right, bottom }) =>
      [left - offsetLeft, top - offsetTop, right - offsetLeft, bottom - offsetTop].map((edge) => edge * zoom);
    return {
      fault: "", text: element.innerText, scroll: scrollY * zoom, box: onScreen(box),
      lines: own.map(({ line }) => onScreen(line)),
    };
  };
}
