"use strict";
/* The board of a replay: blocks of tokens, each shown from the denoiser call that committed it.

   A block is a list of [text, call, confidence or null]; a token of call 0 came without a call of
   the denoiser. `moments` holds every picture there is, as [block, call]. */
class Board {
  constructor(root, prompt) {
    this.root = root;
    this.blocks = [];
    this.moments = [[0, 0]];
    this.now = 0;
    this.timer = null;
    this.part = (name) => root.querySelector("." + name);
    this.part("board").replaceChildren(Board.element("span", "prompt", prompt));
    this.part("bars").replaceChildren();
    this.part("play").onclick = () => this.toggle();
    this.part("back").onclick = () => this.step(-1);
    this.part("forth").onclick = () => this.step(1);
    this.part("first").onclick = () => this.go(0);
    this.part("last").onclick = () => this.go(this.moments.length - 1);
    this.part("at").oninput = (event) => { this.pause(); this.go(Number(event.target.value)); };
  }

  static element(kind, name, text) {
    const made = document.createElement(kind);
    made.className = name;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  static calls(block) { return Math.max(1, ...block.map((token) => token === null ? 0 : token[1])); }

  /* Put a block, whole or as far as it is, in its place; null is a position that is still masked. */
  put(number, tokens) {
    this.blocks[number] = tokens;
    const known = this.part("board").querySelectorAll(".block");
    const holder = known[number] || Board.element("span", "block");
    if (!known[number]) this.part("board").append(holder);
    holder.replaceChildren(...tokens.map((token, place) => {
      const made = Board.element("span", "masked");
      made.dataset.place = place;
      return made;
    }));
    this.moments = [[0, 0]];
    this.blocks.forEach((block, index) => {
      for (let call = 1; call <= Board.calls(block); call++) this.moments.push([index, call]);
    });
    this.part("at").max = this.moments.length - 1;
    this.bars();
  }

  bars() {
    const most = Math.max(...this.blocks.map(Board.calls));
    this.part("bars").replaceChildren(...this.blocks.map((block, index) => {
      const bar = Board.element("button", "");
      const calls = Board.calls(block);
      bar.style.height = `${100 * calls / most}%`;
      bar.title = `block ${index + 1}: ${calls} denoiser call${calls === 1 ? "" : "s"}`;
      bar.setAttribute("aria-label", bar.title);
      bar.onclick = () => {
        this.pause();
        this.go(this.moments.findIndex(([at, call]) => at === index && call === 1));
      };
      return bar;
    }));
  }

  go(moment) {
    this.now = Math.max(0, Math.min(moment, this.moments.length - 1));
    const [block, call] = this.moments[this.now];
    let masked = 0;
    this.part("board").querySelectorAll(".block").forEach((holder, index) => {
      holder.hidden = index > block || this.now === 0 && index > 0;
      this.blocks[index].forEach((token, place) => {
        const shown = token !== null && (index < block || index === block && token[1] <= call);
        const isNew = shown && index === block && token[1] === call;
        if (index === block && !shown) masked += 1;
        Board.draw(holder.children[place], token, shown && this.now > 0, isNew && this.now > 0);
      });
    });
    [...this.part("bars").children].forEach((bar, index) => bar.classList.toggle("now", index === block));
    this.part("at").value = this.now;
    const size = this.blocks[block] ? this.blocks[block].length : 0;
    const calls = this.blocks[block] ? Board.calls(this.blocks[block]) : 0;
    this.part("where").textContent = this.now === 0
      ? `all ${size} positions masked`
      : `block ${block + 1} of ${this.blocks.length}, call ${call} of ${calls}: ` +
        `${masked} of ${size} masked`;
    if (this.now === this.moments.length - 1) this.pause();
  }

  static draw(place, token, shown, isNew) {
    if (!shown) {
      place.className = "masked";
      place.textContent = "";
      place.removeAttribute("title");
      place.removeAttribute("tabindex");
      return;
    }
    const [text, call, sure] = token;
    place.className = "token" + (isNew ? " new" : "") + (sure === null ? " plain" : "");
    place.textContent = text;
    if (sure !== null) place.style.setProperty("--sure", Math.max(0, Math.min(1, 2 * sure - 1)));
    place.tabIndex = 0;
    place.title = sure === null ? `call ${call}` : `call ${call}, confidence ${(100 * sure).toFixed(1)}%`;
    const detail = place.closest("main").querySelector(".detail");
    place.onclick = place.onfocus = () => {
      detail.textContent = `${JSON.stringify(text)}: committed by ${place.title}`;
    };
  }

  step(by) { this.pause(); this.go(this.now + by); }

  toggle() { if (this.timer === null) this.play(); else this.pause(); }

  play() {
    if (this.now >= this.moments.length - 1) this.go(0);
    this.part("play").textContent = "Pause";
    const tick = () => {
      this.timer = setTimeout(tick, 1000 / Number(this.part("speed").value));
      this.go(this.now + 1);
    };
    this.timer = setTimeout(tick, 0);
  }

  pause() {
    clearTimeout(this.timer);
    this.timer = null;
    this.part("play").textContent = "Play";
  }

  /* Space, arrows, Home and End, unless one types. */
  key(event) {
    const typing = /^(INPUT|TEXTAREA|SELECT|BUTTON)$/.test(event.target.tagName);
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    const acts = {
      " ": () => this.toggle(), ArrowRight: () => this.step(1), ArrowLeft: () => this.step(-1),
      Home: () => { this.pause(); this.go(0); },
      End: () => { this.pause(); this.go(this.moments.length - 1); },
    };
    if (event.key in acts) { event.preventDefault(); acts[event.key](); }
  }
}
