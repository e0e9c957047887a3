// What gradio leaves to be done: names and live regions for screen readers, pauses in typing, copying, downloading.
window.hubmerge = (() => {
  const PAUSE_MS = 900;
  const TYPED = "textarea, input[type=number], input[type=text]:not([role=combobox])";
  let waiting = 0;
  let count = 0;

  const idOf = (element) => (element.id ||= `hm-${++count}`);

  // One group for the arrow keys and for screen readers: gradio gives each button a name of its own, with every choice.
  function joinGroup(radio) {
    const group = radio.closest("fieldset")?.getAttribute("aria-labelledby");
    if (group && radio.name !== group) radio.name = group;
  }

  function nameFields(root) {
    for (const title of root.querySelectorAll("[data-testid=block-info]")) {
      const block = title.closest(".block");
      if (!block) continue;
      const name = title.textContent.trim();
      const info = block.querySelector("[data-testid=block-info] + *:not(.wrap):not(.input-container)");
      if (block.tagName === "FIELDSET") {
        block.setAttribute("aria-labelledby", idOf(title));
        block.querySelectorAll("input[type=radio]").forEach(joinGroup);
      }
      for (const field of block.querySelectorAll("textarea, input:not([type=radio]):not([type=checkbox])")) {
        const number = field.type === "number" && block.querySelector("input[type=range]");
        field.setAttribute("aria-label", number ? `${name} (number)` : name);
        if (info && info.textContent.trim()) field.setAttribute("aria-describedby", idOf(info));
      }
    }
  }

  function nameAccordions() {
    for (const button of document.querySelectorAll("button.label-wrap")) {
      const content = button.parentElement.querySelector("[data-testid=accordion-content]");
      button.querySelector(".icon")?.setAttribute("aria-hidden", "true");
      button.setAttribute("aria-expanded", String(content?.style.display !== "none"));
    }
  }

  function tidy() {
    waiting = 0;
    nameFields(document);
    nameAccordions();
    keepFocus();
    for (const region of document.querySelectorAll(".block.hm-live:not([role])")) {
      region.setAttribute("role", "status");
      region.setAttribute("aria-live", "polite");
    }
    if (window.self !== window.top) {
      // A page of the Hub's that shows this one in a frame may not be signed in to from within it.
      for (const link of document.querySelectorAll("a.hm-sign-in")) link.target = "_blank";
    }
  }

  let last = null;
  document.addEventListener("focusin", (event) => (last = event.target));

  function keepFocus() {
    // The button that removed the last model is gone with it.
    if (!last || last.isConnected || document.activeElement !== document.body) return;
    last = null;
    document.querySelector("#hm-add")?.focus();
  }

  function later() {
    waiting ||= requestAnimationFrame(tidy);
  }

  const pauses = new WeakMap();
  document.addEventListener("input", (event) => {
    const field = event.target;
    if (!(field instanceof HTMLElement) || !field.matches(TYPED)) return;
    clearTimeout(pauses.get(field));
    // A pause in typing counts as leaving the field: the recipe and the plan follow.
    pauses.set(field, setTimeout(() => {
      if (document.activeElement === field) field.dispatchEvent(new FocusEvent("blur"));
    }, PAUSE_MS));
  });

  document.addEventListener("click", () => setTimeout(later, 50));
  document.addEventListener("click", async (event) => {
    const button = event.target instanceof Element && event.target.closest("[data-copy]");
    if (!button) return;
    const code = button.closest(".hm-take").querySelector("code").textContent;
    await navigator.clipboard.writeText(code);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });

  function download(name, text) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text || ""], { type: "application/yaml" }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  new MutationObserver(later).observe(document.documentElement, { childList: true, subtree: true });
  new MutationObserver((changes) => {
    for (const { target } of changes) if (target.type === "radio") joinGroup(target);
  }).observe(document.documentElement, { subtree: true, attributeFilter: ["name"] });
  later();
  return { download };
})();
