"use strict";
(async () => {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (one) => one.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const library = document.createElement("script");
  library.textContent = await new Response(stream).text();
  document.head.append(library);
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const places = [...document.querySelectorAll(".figure")];
  const config = { responsive: true, displayModeBar: false };  // a drag zooms, and a double click takes it back
  for (const [number, place] of places.entries()) {
    await Plotly.newPlot(place, figures[number].data, figures[number].layout, config);
  }
  for (const box of document.querySelectorAll("nav input")) {
    box.addEventListener("change", () => {
      for (const place of places) {
        const ofRun = place.data.flatMap((one, at) => (one.meta?.run === Number(box.value) ? [at] : []));
        if (ofRun.length) Plotly.restyle(place, { visible: box.checked }, ofRun);
      }
    });
  }
  document.body.dataset.drawn = places.length;
})().catch((error) => {
  document.body.dataset.failed = String(error);
  for (const place of document.querySelectorAll(".figure")) place.textContent = `This browser cannot draw it: ${error}`;
});
