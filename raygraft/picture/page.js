"use strict";
// Shows the text of the box that is pointed at or has the focus; a click keeps it.
(() => {
  const panel = document.querySelector(".panel");
  const unfold = document.getElementById("unfold");
  let kept = null;

  const boxesOf = (key) => document.querySelectorAll(`.box[data-key="${key}"]`);

  function show(key) {
    for (const old of document.querySelectorAll(".shown, .chosen")) {
      old.classList.remove("shown", "chosen");
    }
    if (!key) return;
    document.getElementById(key).classList.add("shown");
    for (const box of boxesOf(key)) box.classList.add("chosen");
    panel.scrollTop = 0;
  }

  function keep(key) {
    kept = kept === key ? null : key;
    show(kept);
  }

  function goTo(box) {
    box.focus({ preventScroll: true });
    box.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  for (const drawing of document.querySelectorAll(".drawing")) {
    const boxes = [...drawing.querySelectorAll(".box")];
    boxes.forEach((box, number) => {
      const key = box.dataset.key;
      box.addEventListener("pointerenter", () => show(key));
      box.addEventListener("pointerleave", () => show(kept));
      box.addEventListener("focus", () => show(key));
      box.addEventListener("blur", () => show(kept));
      box.addEventListener("click", (event) => {
        event.preventDefault();
        keep(key);
      });
      box.addEventListener("keydown", (event) => {
        const step = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
        if (step === undefined) return;
        event.preventDefault();
        goTo(boxes[Math.max(0, Math.min(boxes.length - 1, number + step))]);
      });
    });
  }

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      kept = null;
      show(null);
    }
  });

  for (const link of document.querySelectorAll(".unfold")) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      unfold.checked = true;
      const first = document.querySelector(`.all .box[data-key="${link.dataset.stage}"]`);
      first.scrollIntoView({ block: "center" });
      first.focus({ preventScroll: true });
    });
  }

  panel.classList.add("script");
  const asked = decodeURIComponent(location.hash.slice(1));
  if (document.getElementById(asked)?.classList.contains("detail")) keep(asked);
  document.body.dataset.ready = "true";
})();
