"""The page of the demo: one document without anything from elsewhere. Data enters it as text, never as markup."""

DEMO_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>mmscale demo</title>
<style>
  body { font: 15px/1.45 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #1d2330 }
  h1 { font-size: 1.4rem; margin-bottom: 0 } h2 { font-size: 1rem; margin: 1.4rem 0 .4rem }
  .muted { color: #6b7280; font-size: .9em } .error { color: #b22222; min-height: 1.4em }
  .columns { display: grid; grid-template-columns: 16rem 1fr; gap: 2rem; margin-top: 1rem }
  #drop { border: 2px dashed #9aa3b2; border-radius: 10px; min-height: 14rem; display: grid; place-items: center;
          text-align: center; cursor: pointer; padding: .5rem }
  #drop.over, #drop:focus-visible { border-color: #2457d6; background: #eef3ff; outline: none }
  #drop img { width: 100%; border-radius: 6px }
  input[type=text] { width: 100%; box-sizing: border-box; padding: .5rem; border: 1px solid #9aa3b2;
                     border-radius: 6px; font: inherit }
  ul { margin: 0; padding-left: 1.2rem }
  .bar { display: grid; grid-template-columns: 10rem 1fr 4rem; gap: .6rem; align-items: center; margin: .15rem 0 }
  .bar div { background: #e6e9f0; border-radius: 4px; height: .9rem } .bar i { display: block; height: 100%;
             background: #2457d6; border-radius: 4px }
  #nearest { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: .8rem }
  #nearest button { border: 1px solid #d5d9e2; border-radius: 8px; background: none; padding: .4rem; text-align: left;
                    font: inherit; cursor: pointer; overflow-wrap: anywhere }
  #nearest button:hover, #nearest button:focus-visible { border-color: #2457d6; outline: none }
  #nearest img { width: 100%; border-radius: 4px } .busy { opacity: .5 }
  @media (max-width: 40rem) { .columns { grid-template-columns: 1fr } }
</style>
</head>
<body>
<h1>mmscale demo</h1>
<div class="muted" id="about"></div>
<div class="columns">
  <div>
    <div id="drop" tabindex="0" role="button" aria-label="choose a picture">Drop a picture here,<br>or click</div>
    <input type="file" id="file" accept="image/*" hidden>
    <h2><label for="names">Class names, with commas between them</label></h2>
    <input type="text" id="names" value="circle, square, triangle, star">
  </div>
  <div>
    <div class="error" id="error" role="alert"></div>
    <div id="searching">
      <h2><label for="text">Search by text</label></h2>
      <input type="text" id="text" placeholder="a small red circle, then Enter">
    </div>
    <div id="results" aria-live="polite">
      <h2 id="captions-title" hidden>Captions</h2><ul id="captions"></ul>
      <h2 id="classes-title" hidden>Classes</h2><div id="classes"></div>
      <h2 id="nearest-title" hidden>Nearest pictures</h2><div id="nearest"></div>
    </div>
  </div>
</div>
<script>
  const at = id => document.getElementById(id);
  const make = (kind, text) => Object.assign(document.createElement(kind), {textContent: text ?? ""});
  let current = null;  // the request that describes the picture on show

  async function ask(path, request) {
    at("error").textContent = "";
    at("results").classList.add("busy");
    try {
      const answer = await fetch(path, {method: "POST", body: JSON.stringify(request),
                                        headers: {"Content-Type": "application/json"}});
      const content = await answer.json();
      if (!answer.ok) throw new Error(content.error);
      return content;
    } catch (error) {
      at("error").textContent = error.message;
    } finally {
      at("results").classList.remove("busy");
    }
  }

  async function describe(request) {
    current = request;
    const names = at("names").value.split(",").map(name => name.trim()).filter(Boolean);
    const found = await ask("/api/describe", {...request, names});
    if (found) show(found);
  }

  async function search(text) {
    const found = await ask("/api/search", {text});
    if (found) show({captions: [], classes: [], ...found});
  }

  function show(found) {
    if (found.image) {
      const seen = Object.assign(new Image(), {src: found.image, alt: "the picture, as the model sees it"});
      at("drop").replaceChildren(seen);
    }
    for (const part of ["captions", "classes", "nearest"]) at(part + "-title").hidden = !found[part].length;
    at("captions").replaceChildren(...found.captions.map(caption => make("li", caption)));
    at("classes").replaceChildren(...found.classes.map(({name, share}) => {
      const bar = make("div"), row = make("div"), filled = make("i");
      filled.style.width = (100 * share).toFixed(1) + "%";
      bar.append(filled);
      row.className = "bar";
      row.append(make("span", name), bar, make("span", (100 * share).toFixed(1) + "%"));
      return row;
    }));
    at("nearest").replaceChildren(...found.nearest.map(entry => {
      const card = make("button");
      card.title = "describe this picture";
      card.append(Object.assign(new Image(), {src: entry.image, alt: ""}),
                  make("div", entry.caption || entry.name),
                  Object.assign(make("div", entry.similarity.toFixed(3)), {className: "muted"}));
      card.onclick = () => describe({place: entry.place});
      return card;
    }));
  }

  function take(file) {
    if (!file) return;
    const reader = new FileReader();
    reader.onload = () => describe({image: reader.result.slice(reader.result.indexOf(",") + 1)});
    reader.readAsDataURL(file);
  }

  const drop = at("drop");
  drop.onclick = () => at("file").click();
  drop.onkeydown = event => { if (event.key === "Enter" || event.key === " ") at("file").click(); };
  drop.ondragover = event => { event.preventDefault(); drop.classList.add("over"); };
  drop.ondragleave = () => drop.classList.remove("over");
  drop.ondrop = event => { event.preventDefault(); drop.classList.remove("over"); take(event.dataTransfer.files[0]); };
  at("file").onchange = event => take(event.target.files[0]);
  at("names").onchange = () => { if (current) describe(current); };
  at("text").onkeydown = event => { if (event.key === "Enter") search(event.target.value); };

  fetch("/api/about").then(answer => answer.json()).then(about => {
    at("about").textContent = `${about.model}: ${about.parameters.toLocaleString()} parameters` +
      (about.pictures ? `, ${about.pictures.toLocaleString()} pictures to search` : "");
    at("searching").hidden = !about.pictures;
    // Links to a search (?text=red circle) or to a picture of the index (?place=3).
    const link = new URLSearchParams(location.search);
    if (link.has("text")) { at("text").value = link.get("text"); search(link.get("text")); }
    else if (link.has("place")) describe({place: Number(link.get("place"))});
  });
</script>
</body>
</html>
"""
