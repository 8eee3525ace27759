/* What the book's own scripts share: making elements, loading scripts, starting what comes near.

   browse.js and circuit.js hand their start to companionParts, so that these scripts may come in any
   order; a part is called with the tools below. */
"use strict";
(() => {
  const NEAR = "600px";
  const expected = new Map();

  /** Load a script once: a page opened from disk may load a script but not fetch a file. */
  function loaded(source) {
    if (!expected.has(source)) {
      expected.set(source, new Promise((resolve, reject) => {
        const script = document.createElement("script");
        script.src = source;
        script.onload = resolve;
        script.onerror = reject;
        document.head.append(script);
      }));
    }
    return expected.get(source);
  }

  /** An element with properties, attributes (names with a dash, and role) and children. */
  function element(tag, properties = {}, ...children) {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(properties)) {
      if (key.includes("-") || key === "role") made.setAttribute(key, value);
      else made[key] = value;
    }
    made.append(...children);
    return made;
  }

  /** Call `takeOver` with each box of the page, once, when it comes near; `ready` with all. */
  function whenNear(selector, takeOver, ready = () => {}) {
    function start() {
      const boxes = document.querySelectorAll(selector);
      const watch = new IntersectionObserver((entries) => {
        for (const { isIntersecting, target } of entries) {
          if (!isIntersecting) continue;
          watch.unobserve(target);
          takeOver(target);
        }
      }, { rootMargin: NEAR });
      for (const box of boxes) watch.observe(box);
      ready(boxes);
    }
    if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
    else start();
  }

  const tools = { element, loaded, whenNear };
  for (const part of window.companionParts ?? []) part(tools);
  window.companionParts = { push: (part) => part(tools) };
})();
