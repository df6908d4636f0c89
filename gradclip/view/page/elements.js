// Elements made of a name, properties and children. Text is always text, never HTML.

/**
 * Return a new element.
 *
 * @param name Its tag, with classes: "button.quiet".
 * @param properties Its properties by name; those with a "-" and "role" are attributes, and functions
 *   listen to the event that they are named after.
 * @param children Elements and texts; null is left out.
 */
export function element(name, properties = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const made = document.createElement(tag);
  made.classList.add(...classes);
  for (const [key, value] of Object.entries(properties)) {
    if (typeof value === "function") made.addEventListener(key, value);
    else if (key.includes("-") || key === "role") made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children.flat(2).filter((child) => child !== null));
  return made;
}

/** Put children in place of all those that an element has. */
export function refill(parent, ...children) {
  parent.replaceChildren(...children.flat().filter((child) => child !== null));
}

/** A button that is pressed or not. */
export function toggle(label, pressed, change, properties = {}) {
  const button = element(
    "button",
    { type: "button", "aria-pressed": String(pressed), ...properties },
    label,
  );
  button.addEventListener("click", () => {
    const isPressed = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(isPressed));
    change(isPressed);
  });
  return button;
}

/** A button that copies a text, and says so. */
export function copyButton(text) {
  const button = element("button", { type: "button", click: () => copied(text).then(say) }, "Copy");
  const say = (done) => {
    button.textContent = done ? "Copied" : "Select and copy by hand";
    setTimeout(() => {
      button.textContent = "Copy";
    }, 2000);
  };
  return button;
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // A frame of a notebook may not use the clipboard; the older command needs no permission.
    const area = element("textarea", { value: text, "aria-hidden": "true", readOnly: true });
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}
